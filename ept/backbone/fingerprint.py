"""What identifies a backbone, written beside an adapter and compared when it is loaded."""

import hashlib
from typing import Any

import torch
from torch import nn

from ept.backbone.embeddings import weight_of
from ept.sharding import whole

__all__ = ["backbone_fingerprint", "check_fingerprint"]

# What must agree between the backbone that an adapter was trained on and the one it is put on.
_CONFIG_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def backbone_fingerprint(config: Any, embedding: nn.Module) -> dict[str, Any]:
    """What identifies a backbone: facts of its config, and its word embeddings.

    The embeddings' SHA-256 is compared where the dtype is the same; a sample of entries, to a bfloat16's precision,
    where it is not, so that an adapter trained beside a bf16 backbone loads onto the fp32 one.
    """
    weight = whole(weight_of(embedding)).detach()
    facts = {key: getattr(config, key) for key in _CONFIG_KEYS if getattr(config, key, None) is not None}
    facts["embedding_shape"] = list(weight.shape)
    if weight.is_meta:
        return facts
    flat = weight.contiguous().view(torch.uint8).flatten().cpu().numpy()
    sample = weight.flatten()[:: max(1, weight.numel() // 64)][:64]
    return facts | {
        "embedding_dtype": str(weight.dtype).removeprefix("torch."),
        "embedding_sha256": hashlib.sha256(flat.data).hexdigest(),
        "embedding_sample": [float(f"{value:.6g}") for value in sample.float().tolist()],
    }


def check_fingerprint(saved: dict[str, Any], current: dict[str, Any], *, may_ignore: bool = False) -> None:
    """Raises ValueError if two backbones differ, which names the first difference.

    Args:
        may_ignore: whether the caller has an argument `ignore_backbone_mismatch`, which the message then names.
    """
    hint = "give the backbone that the adapter was trained on, `model`"
    if may_ignore:
        hint += ", or pass `ignore_backbone_mismatch=True`"
    for key in (*_CONFIG_KEYS, "embedding_shape"):
        if saved.get(key) != current.get(key):
            raise ValueError(
                f"the adapter belongs to another backbone: {key} was {saved.get(key)}, here it is {current.get(key)}; {hint}"
            )
    if "embedding_sha256" not in saved or "embedding_sha256" not in current:
        return
    if saved["embedding_dtype"] == current["embedding_dtype"]:
        same = saved["embedding_sha256"] == current["embedding_sha256"]
    else:
        # bfloat16 keeps 8 bits: a value moves by at most 2^-8 of itself; two roundings (fp16 and bf16) by twice that.
        a, b = torch.tensor(saved["embedding_sample"]), torch.tensor(current["embedding_sample"])
        same = torch.allclose(a, b, rtol=2**-7, atol=1e-6)
    if not same:
        raise ValueError(f"the adapter belongs to another backbone: its word embeddings differ; {hint}")
