"""The points that the microbenchmarks measure: a stem, a way of computing it, and its sizes.

There is a base point, and along each axis a smaller and a larger value (on a GPU partly one) with everything else as in
the base. Beside the stems stand the peers' embedding steps on the same batch.

| stem | what runs |
|---|---|
| lowrank_update | prompt_embed with the low-rank update of the text alone |
| token_update | prompt_embed with the token-conditioned update alone |
| reconstruct_prompt | P* from prompt, fusion and spaces |
| prompt_embed | everything |
| layer_update | the update of the hidden states that a layer reads |
| embedding_step | the peers: embedding + concatenation (the floor), PEFT's prompt tuning, DePT's formula, PEFT's LoRA |
"""

import dataclasses
from typing import Any

from ept_kernels.prompt_embed import traffic

__all__ = [
    "AXES", "BASE", "FLOOR", "LORA_LAYERS", "LORA_RANK", "PEERS", "STEMS", "Point",
    "named", "points", "points_of_presets", "sizes_of_peer", "sizes_of_stem",
]  # fmt: skip

# Stem -> the sizes that it depends on; it has no parts of other sizes.
STEMS = {
    "lowrank_update": ("d", "n", "r", "batch", "length"),
    "token_update": ("d", "q", "batch", "length"),
    "reconstruct_prompt": ("d", "s", "n", "r", "k", "h"),
    "prompt_embed": ("d", "s", "n", "r", "k", "h", "q", "batch", "length"),
    "layer_update": ("d", "q", "batch", "length"),
}
PEERS = ("embedding + concatenation", "prompt tuning 20", "prompt tuning 100", "DePT", "LoRA r = 4, 12 layers")
FLOOR = PEERS[0]
LORA_RANK, LORA_LAYERS = 4, 12

# The base, and the values of each axis beside it.
BASE = {
    "cpu": traffic.Shapes(batch=8, length=128, d=768, s=20, n=256, r=30, k=4, h=2, q=24, source_bytes=4),
    "cuda": traffic.Shapes(batch=32, length=256, d=768, s=60, n=256, r=30, k=4, h=8, q=24, source_bytes=2),
}
AXES: dict[str, dict[str, tuple[int, ...]]] = {
    "cpu": dict(
        d=(384, 1536), s=(4, 60), n=(128, 1024), r=(8, 60), k=(2, 8), h=(4, 16), q=(8, 48), batch=(2, 32), length=(32, 512)
    ),
    # One value where another size is another kernel to compile.
    "cuda": dict(
        d=(4096,), s=(4, 100), n=(128, 1024), r=(64,), k=(8,), h=(16,), q=(64,), batch=(8, 128), length=(64, 1024)
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    stem: str
    impl: str  # "reference", "torch", "compile" (of "torch"), "triton", "auto", or a peer's name
    axis: str  # the size that differs from the base's, "base", or the name of a preset
    sizes: traffic.Shapes
    adapters: int = 0  # among which layer_update's rows are divided; 0: one adapter, without an index

    def __str__(self) -> str:
        value = f"={getattr(self.sizes, self.axis)}" if hasattr(self.sizes, self.axis) else ""
        return f"{self.stem}-{self.impl}-{self.axis}{value}"


def points(device: str) -> list[Point]:
    """Every point of a device type, the implementations of the same sizes beside each other."""
    base, axes = BASE[device], AXES[device]
    impls = ("reference", "torch", "compile") + (("triton",) if device == "cuda" else ())
    chosen = []
    for stem, depends in STEMS.items():
        for axis, sizes in _along(base, {axis: axes[axis] for axis in depends}):
            chosen += [Point(stem, impl, axis, sizes_of_stem(sizes, stem)) for impl in impls]
    for axis, sizes in _along(base, {axis: axes[axis] for axis in ("d", "batch", "length")}):
        chosen += [Point("embedding_step", peer, axis, sizes_of_peer(sizes, peer)) for peer in PEERS]
    return chosen


# Preset -> its sizes in prompt_embed. In layer_update only the preset "deep" has any. "default preset" is
# EPTConfig.input_only(), by its name in results on record.
PRESETS: dict[str, dict[str, Any]] = {
    "default preset": dict(s=4, k=4, h=2, q=38),
    "deep preset": dict(s=2, q=4),
    "all parts": dict(s=60, n=256, r=30, k=4, h=8, q=24),
}


def points_of_presets(small: bool = False) -> list[Point]:
    """Both stems at the presets' sizes as impl="auto" computes them, and beside them the floor, eager torch and LoRA.

    In bf16 at d = 768 (25 MB of embeddings read and written) and d = 4096 (268 MB); `small`: in fp32 at tiny sizes.
    """
    texts = ((32, 256, 768), (64, 256, 4096))
    chosen = []
    for batch, length, d in ((2, 8, 32), (2, 8, 48)) if small else texts:
        text: dict[str, Any] = dict(batch=batch, length=length, d=d, source_bytes=4 if small else 2)
        sizes = {preset: traffic.Shapes(**text, **parts) for preset, parts in PRESETS.items()}
        for preset in PRESETS:
            chosen += [Point("prompt_embed", impl, preset, sizes[preset]) for impl in ("auto", "torch")]
        deep = sizes_of_stem(sizes["deep preset"], "layer_update")
        for adapters in (0, 2 if small else 32):
            axis = f"{adapters} adapters" if adapters else "deep preset"
            chosen += [Point("layer_update", impl, axis, deep, adapters) for impl in ("auto", "torch")]
        # PEFT's LoRA on projections of the same states; what torch.compile makes of the update is in `points`.
        chosen.append(Point("embedding_step", PEERS[-1], "deep preset", sizes_of_peer(deep, PEERS[-1])))
        chosen.append(Point("embedding_step", FLOOR, "default preset", sizes_of_peer(sizes["default preset"], FLOOR)))
    return chosen


def named(device: str, part: str) -> list[Point]:
    """The points whose name holds `part`. ValueError if there are none."""
    matching = [point for point in points(device) if part in str(point)]
    if not matching:
        raise ValueError(f"{part!r}: no microbenchmark has this in its name; names are like {points(device)[0]}")
    return matching


def _along(base: traffic.Shapes, axes: dict[str, tuple[int, ...]]) -> list[tuple[str, traffic.Shapes]]:
    along = [("base", base)]
    for axis, values in axes.items():
        for value in values:
            change: dict[str, Any] = {axis: value}
            along.append((axis, dataclasses.replace(base, **change)))
    return along


def sizes_of_stem(sizes: traffic.Shapes, stem: str) -> traffic.Shapes:
    """The sizes with the parts that the stem does not have at zero."""
    depends = STEMS[stem]
    absent: dict[str, Any] = {size: 0 for size in ("n", "r", "k", "h", "q") if size not in depends}
    if "length" not in depends:
        absent |= {"batch": 1, "length": 0, "masked": False}
    if stem == "layer_update":
        absent |= {"s": 0, "masked": False}
    return dataclasses.replace(sizes, **absent)


def sizes_of_peer(sizes: traffic.Shapes, peer: str) -> traffic.Shapes:
    """The sizes with the parts that a peer does not have at zero."""
    absent: dict[str, Any] = {"n": 0, "r": 0, "k": 0, "h": 0, "q": 0}
    if peer == "DePT":
        absent |= {"n": sizes.length, "r": sizes.r}
    elif peer.startswith("prompt tuning"):
        absent |= {"s": int(peer.split()[-1])}
    elif peer.startswith("LoRA"):
        absent |= {"s": 0, "r": LORA_RANK}
    return dataclasses.replace(sizes, **absent, masked=False)
