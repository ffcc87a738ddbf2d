"""A causal language model learns to answer: training on the answers alone, then generation.

Run `pip install '.[all]'`, then `python examples/causal_lm.py`: about 10 seconds on two CPU cores. So that nothing has to be
downloaded, the model is a tiny Llama with random weights and every byte is a token. Put a pretrained model and its
tokenizer in their place for real use.
"""

import argparse

import torch
from transformers import ByT5Tokenizer, DataCollatorForSeq2Seq, LlamaConfig, LlamaForCausalLM

from ept import EPTConfig, EPTModel, get_ept_model
from ept.training import EPTTrainer, EPTTrainingArguments

ADJECTIVES = {"superb": "yes", "funny": "yes", "moving": "yes", "dull": "no", "weak": "no", "clumsy": "no"}
QUESTIONS = [(f"the {noun} is {word}. go? ", answer) for noun in ("film", "plot", "cast", "end", "music")
             for word, answer in ADJECTIVES.items()]  # fmt: skip


def backbone() -> LlamaForCausalLM:
    """The same random weights at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=0.1,
    ))  # fmt: skip


def encode(tokenizer: ByT5Tokenizer, question: str, answer: str) -> dict[str, list[int]]:
    """Tokens of a question and its answer; -100 marks the question as not to be learned."""
    asked, answered = tokenizer(question, add_special_tokens=False).input_ids, tokenizer(answer).input_ids
    ids = asked + answered
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(asked) + answered}


def main(steps: int) -> None:
    tokenizer = ByT5Tokenizer(padding_side="left")
    model = get_ept_model(backbone(), EPTConfig(token_rank=16), tokenizer=tokenizer)
    arguments = EPTTrainingArguments("runs/causal_lm", max_steps=steps, per_device_train_batch_size=10,
                                     learning_rate=0.02)  # fmt: skip
    rows = [encode(tokenizer, *row) for row in QUESTIONS]
    EPTTrainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)).train()
    model.save_pretrained("runs/causal_lm")

    model = EPTModel.from_pretrained(backbone(), "runs/causal_lm").eval()
    texts = ["the film is funny. go? ", "the music is weak. go? "]
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids = model.generate(batch.input_ids, batch.attention_mask, max_new_tokens=5, do_sample=False)
    print(*tokenizer.batch_decode(ids, skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    main(parser.parse_args().steps)
