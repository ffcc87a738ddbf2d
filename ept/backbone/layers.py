"""A backbone's layers: where they stand, how wide they are, and the size of what they read.

They are found by a trial: the largest list of modules, and the siblings beside it, are watched in one pass over a few
tokens. What matters is what is read, in which order; so layers may share their weights or be wider than the embeddings.
"""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ept.backbone.embeddings import device_of, embedding_width, lacks_weights, weight_of
from ept.backbone.probes import beside_embeddings, evaluating
from ept.backbone.traits import is_encoder_decoder, positions_of, text_part

__all__ = [
    "LayerSites", "find_layers", "hidden_states_of", "layers_of", "look_for_layers",
    "why_no_updates",
]  # fmt: skip

PROBE_TOKENS = 32
PROBE_VOCABULARY = 5000
OUTLIER_SIZE = 3.0  # of a token, in units of h; none of MiniLM's in the trial is as large
USUAL_SPREAD = 0.88  # MiniLM's, on which the rates were found; SmolLM2's is 0.58, Gemma 3's 0.25


@dataclass(frozen=True)
class LayerSites:
    """Where the updates in the layers act: one site for each call of a layer after the first call.

    Attributes:
        path: of the list of modules, in the backbone.
        order: [sites] which module of the list is called at each site. Layers that share their weights repeat it.
        at: whether hidden states are updated where the module reads them ("input") or where it gives them ("output").
        first: the module that is called before the first site.
        batch_dim: which dimension of the hidden states has the rows: 0, or 1 where columns come first.
        width: d_layer, of the hidden states.
        sizes: [sites] fp32, h: the median over the tokens of the root mean square of the hidden states there, which a
            few tokens of enormous size do not move. Ones where nothing can be measured, on the meta device.
        outliers: [sites, width] fp32, the direction of the largest token there, of length 1, where it is OUTLIER_SIZE times h
            or larger. Zeros elsewhere. In causal models it is that of the first token, which the others attend to.
        spreads: [sites] fp32, how far tokens differ there, in units of h: the median over the tokens of the root mean square
            of the hidden states less their channels' medians.
    """

    path: str
    order: tuple[int, ...]
    at: Literal["input", "output"]
    first: int | None
    batch_dim: int
    width: int
    sizes: Tensor
    outliers: Tensor
    spreads: Tensor

    @property
    def rate(self) -> float:
        """The factor on the default learning rate of the updates in these layers: 1, or less where tokens differ little.

        In tenths, so that the dtype in which the backbone computes seldom changes it, and at least 0.1.
        """
        return min(1.0, max(0.1, round(self.spreads.median().item() / USUAL_SPREAD, 1)))

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The modules of the list, in order."""
        return list(cast(nn.ModuleList, model.get_submodule(self.path)))

    def calls(self, modules: Sequence[nn.Module]) -> dict[nn.Module, tuple[int | None, ...]]:
        """For each module, the sites of its calls in one pass; None for the call before the first site."""
        numbers: dict[nn.Module, tuple[int | None, ...]] = {}
        sequence: list[tuple[int, int | None]] = [] if self.first is None else [(self.first, None)]
        for index, site in [*sequence, *((index, site) for site, index in enumerate(self.order))]:
            if index < len(modules):
                numbers[modules[index]] = (*numbers.get(modules[index], ()), site)
        return {module: sites for module, sites in numbers.items() if sites != (None,)}


def why_no_updates(model: Any) -> str | None:
    """Why updates in the layers of a model are impossible, in words; None where they are possible."""
    found = look_for_layers(model)
    return found if isinstance(found, str) else None


def find_layers(model: Any) -> LayerSites:
    """The sites of updates in a model's layers. ValueError, with the reason, where they are impossible."""
    found = look_for_layers(model)
    if isinstance(found, str):
        raise ValueError(
            f"{type(model).__name__} has no updates in its layers: {found}; set deep_layers=0, as EPTConfig.input_only() has it"
        )
    return found


def layers_of(model: Any) -> list[nn.Module]:
    """The modules of the largest list in the part that reads text; empty where there is none."""
    candidates = _candidates(model)
    return list(candidates[0][0]) if candidates else []


def _candidates(model: Any) -> list[list[nn.ModuleList]]:
    """Lists of modules in the part that reads text, the largest first, each with those beside it that are as long.

    A list within a larger one, of experts in a layer, say, is none.
    """
    by_size: list[tuple[int, list[nn.ModuleList]]] = []
    for parent in text_part(model).modules():
        lists = [child for child in parent.children() if isinstance(child, nn.ModuleList) and len(child)]
        for candidate in lists:
            if any(True for module in candidate for _ in module.children()):  # not of tables or matrices
                beside = [other for other in lists if len(other) == len(candidate) and other is not candidate]
                by_size.append((sum(p.numel() for p in candidate.parameters()), [candidate, *beside]))
    candidates: list[list[nn.ModuleList]] = []
    within: set[int] = set()
    for _, lists in sorted(by_size, key=lambda pair: -pair[0]):
        if not any(id(each) in within for each in lists):
            candidates.append(lists)
            within.update(id(module) for each in lists for module in each.modules())
    return candidates


@dataclass(frozen=True)
class _Visit:
    """A module that was called in the trial: its list, its place in it, what it read, and what it gave."""

    number: int
    index: int
    read: Any
    gave: Any


def look_for_layers(model: Any) -> LayerSites | str:
    """The sites of updates in a model's layers, or in words why there are none."""
    candidates = _candidates(model)
    if not candidates:
        return "it has no list of layers"
    names = {id(module): name for name, module in model.named_modules()}
    if lacks_weights(model):
        lists, embedding = candidates[0], model.get_input_embeddings()
        count, width = len(lists[0]), getattr(model.config.get_text_config(), "hidden_size", embedding_width(embedding))
        if count < 2 or len(lists) > 1:
            return "on the meta device it can be said of two layers or more in one list only"
        unknown = torch.ones(count - 1), torch.zeros(count - 1, width), torch.ones(count - 1)
        return LayerSites(names[id(lists[0])], tuple(range(1, count)), "input", 0, 0, width, *unknown)
    for lists in candidates:  # the first may be of what sees images, and rests where there is text alone
        paths = [names[id(each)] for each in lists]
        try:
            visits, columns = _trial(model, lists)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return f"its layers could not be watched at work ({error})"
        if visits:
            parts = any(visit.number for visit in visits)
            return _in_parts(visits, paths, columns) if parts else _whole(visits, paths[0], columns)
    return "its layers are not called as modules, so that nothing can be put before what they read"


def _whole(visits: list[_Visit], path: str, columns: int) -> LayerSites | str:
    """The sites of layers that stand in one list, each a module that reads the hidden states."""
    if len(visits) < 2:
        return "it has no layers after the first"
    batch_dim = _batch_dim([visit.read for visit in visits], columns)
    if isinstance(batch_dim, str):
        return batch_dim
    later = visits[1:]
    order = tuple(visit.index for visit in later)
    measured = _measure([visit.read for visit in later])
    return LayerSites(path, order, "input", visits[0].index, batch_dim, later[0].read.shape[-1], *measured)


def _in_parts(visits: list[_Visit], paths: list[str], columns: int) -> LayerSites | str:
    """The sites of layers whose parts stand in several lists, where what the last part gives is what the next layer reads."""
    layers: list[list[_Visit]] = []
    for visit in visits:
        if not layers or layers[-1][-1].index != visit.index:
            layers.append([])
        layers[-1].append(visit)
    numbers = {layer[-1].number for layer in layers}
    if len(layers) < 2:
        return "it has no layers after the first"
    if len(numbers) > 1 or len({layer[-1].index for layer in layers}) < len(layers):
        return "the parts of its layers stand in several lists and are not called in their order"
    batch_dim = _batch_dim([layer[-1].gave for layer in layers], columns)
    if isinstance(batch_dim, str):
        return batch_dim
    for layer, after in itertools.pairwise(layers):
        if not isinstance(after[0].read, Tensor) or not torch.equal(layer[-1].gave, after[0].read):
            return "the parts of its layers stand in several lists, and no part gives what the next layer reads"
    before = layers[:-1]
    order, given = tuple(layer[-1].index for layer in before), [layer[-1].gave for layer in before]
    return LayerSites(paths[numbers.pop()], order, "output", None, batch_dim, given[0].shape[-1], *_measure(given))


def _batch_dim(states: list[Any], columns: int) -> int | str:
    """Which dimension of the hidden states of one row is the rows'; a reason where they are none."""
    if any(not isinstance(state, Tensor) or state.dim() != 3 or not state.is_floating_point() for state in states):
        return "its layers do not hand on hidden states [batch, columns, width]"
    if len({state.shape[-1] for state in states}) > 1:
        return "its layers are of several widths"
    for dim in (0, 1):
        if all(state.shape[dim] == 1 and state.shape[1 - dim] >= columns for state in states):
            return dim
    return "its layers do not read every column of the text"


def _measure(states: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """`sizes`, `outliers` and `spreads` of hidden states of one row each."""
    sizes, outliers, spreads = [], [], []
    for state in states:
        tokens = state.float().reshape(-1, state.shape[-1])
        of_token = tokens.square().mean(-1).sqrt()
        median, largest = of_token.median(), of_token.argmax()
        direction = nn.functional.normalize(tokens[largest], dim=0)
        sizes.append(median.cpu())
        outliers.append((direction * (of_token[largest] >= OUTLIER_SIZE * median)).cpu())
        apart = (tokens - tokens.median(0).values).square().mean(-1).sqrt()
        spreads.append((apart.median() / median).nan_to_num(1.0).cpu())
    return torch.stack(sizes), torch.stack(outliers), torch.stack(spreads)


@torch.no_grad()
def _trial(model: Any, lists: list[nn.ModuleList]) -> tuple[list[_Visit], int]:
    """The calls of the lists' modules, in order, in a pass over 32 tokens out of the first 5,000 of the vocabulary.

    The first is what a text begins with, if the config names that: some models have their outliers there alone. Also
    returns how many tokens it were.
    """
    embedding, limit = model.get_input_embeddings(), positions_of(model)[0]
    columns = min(PROBE_TOKENS, limit or PROBE_TOKENS)
    # One row: some heads refuse several without a padding token.
    last = min(len(weight_of(embedding)), PROBE_VOCABULARY) - 1
    ids = torch.linspace(0, last, columns, device=device_of(embedding)).long().unsqueeze(0)
    begin = getattr(model.config.get_text_config(), "bos_token_id", None)
    if isinstance(begin, int) and 0 <= begin < len(weight_of(embedding)):
        ids[:, 0] = begin
    visits: list[_Visit] = []
    handles = []
    for number, modules in enumerate(lists):
        for index, module in enumerate(modules):
            handles.append(module.register_forward_pre_hook(_begin(visits, number, index), with_kwargs=True))
            handles.append(module.register_forward_hook(_end(visits, number, index)))
    reader = model.get_encoder() if is_encoder_decoder(model) else model
    try:
        with evaluating(model):
            reader(inputs_embeds=embedding(ids), **beside_embeddings(reader, ids), return_dict=True)
    finally:
        for handle in handles:
            handle.remove()
    return visits, columns


def _begin(visits: list[_Visit], number: int, index: int) -> Callable[[nn.Module, tuple, dict], None]:
    thread = threading.get_ident()

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if threading.get_ident() != thread:
            return  # somebody else's pass over the same layers
        visits.append(_Visit(number, index, _copy(hidden_states_of(args, kwargs)), None))

    return note


def _end(visits: list[_Visit], number: int, index: int) -> Callable[[nn.Module, tuple, Any], None]:
    thread = threading.get_ident()

    def note(module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() != thread:
            return
        place = max(place for place, visit in enumerate(visits) if (visit.number, visit.index) == (number, index))
        visits[place] = replace(visits[place], gave=_copy(output))

    return note


def _copy(state: Any) -> Any:
    """A tensor's copy, since a layer may write into what it reads; anything else as it is."""
    return state.clone() if isinstance(state, Tensor) else state


def hidden_states_of(args: tuple, kwargs: dict) -> Any:
    """What a layer reads, [batch, columns, d_layer], from its forward's arguments."""
    return args[0] if args else kwargs.get("hidden_states")
