"""Small seeded transformers models of every kind that EPT wraps. Random weights: what is tested is the wiring."""

import torch
import transformers as hf

from ept import EPTConfig, MeanPoolingForSequenceClassification, get_ept_model

VOCAB, WIDTH, POSITIONS = 120, 32, 64

_BERT = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=POSITIONS, pad_token_id=0,
)  # fmt: skip
_LLAMA = _BERT | dict(num_key_value_heads=2)
CONFIGS = {
    "bert": lambda: hf.BertConfig(**_BERT),
    "roberta": lambda: hf.RobertaConfig(**_BERT | dict(pad_token_id=1)),
    "electra": lambda: hf.ElectraConfig(**_BERT, embedding_size=16),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=VOCAB, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=POSITIONS
    ),
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "qwen2": lambda: hf.Qwen2Config(**_LLAMA),
    "gemma": lambda: hf.GemmaConfig(**_LLAMA, head_dim=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**_LLAMA, head_dim=8, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"]),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=POSITIONS, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=POSITIONS, word_embed_proj_dim=16, pad_token_id=0,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=4),
    "mpt": lambda: hf.MptConfig(vocab_size=VOCAB, d_model=WIDTH, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
    "t5": lambda: hf.T5Config(
        vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
    ),
    "bart": lambda: hf.BartConfig(
        vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=POSITIONS, scale_embedding=True,
    ),
}  # fmt: skip
CAUSAL = ("llama", "qwen2", "gemma", "gemma3", "gpt2", "opt")
ENCODERS = ("bert", "roberta", "electra", "distilbert")


def backbone(name: str, auto=hf.AutoModel, seed: int = 0, **settings):
    """A model of the given auto class with seeded weights, in eval mode. Dropout stays in its config."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in settings.items():
        setattr(config, key, value)
    return auto.from_config(config).eval()


def mean_pooling(name: str = "bert", num_labels: int = 3, seed: int = 0):
    torch.manual_seed(seed)
    return MeanPoolingForSequenceClassification(backbone(name, seed=seed), num_labels).eval()


def all_parts(**settings) -> EPTConfig:
    """Every part on, at sizes where no two are equal; without dropout, so that a forward pass has one result."""
    sizes = dict(prompt_length=5, max_text_length=16, rank=3, num_spaces=4, space_dim=2, token_rank=6)
    return EPTConfig(**sizes | dict(token_dropout=0.0, deep_layers=0) | settings)


def wrapped(model, config: EPTConfig | None = None, seed: int = 1):
    """The model behind EPT with every tensor away from its start value, in eval mode."""
    torch.manual_seed(seed)
    ept_model = get_ept_model(model, config or all_parts()).eval()
    shake(ept_model)
    return ept_model


@torch.no_grad()
def shake(ept_model, std: float = 0.1, seed: int = 2) -> None:
    g = torch.Generator().manual_seed(seed)
    for parameter in ept_model.ept.parameters():
        parameter += torch.randn(parameter.shape, generator=g) * std


def ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[torch.Tensor], side: str, pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask of rows [1, n] padded on one side to the longest."""
    width = max(row.shape[1] for row in rows)
    out, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        n = row.shape[1]
        columns = slice(0, n) if side == "right" else slice(width - n, width)
        out[i, columns], mask[i, columns] = row[0], 1
    return out, mask
