"""Trains the tokenizer on train.jsonl and writes the dialogues as token ids.

1,024 pieces of byte-pair encoding with byte fallback. Digits are pieces of their own and emoji and the euro sign are
left out of the vocabulary: numbers and some characters then arrive over several tokens, which is what a gateway has to
cope with.

    python tok.py        # reads train.jsonl; writes sp.model, ids.npy, mask.npy
"""

import json

import numpy as np
import sentencepiece as sp

START, END = "<|im_start|>", "<|im_end|>"
BOS = 1


def spelled_in_bytes(c):
    return ord(c) >= 0x2000


def main():
    with open("train.jsonl", encoding="utf-8") as f:
        dialogues = [json.loads(line) for line in f]
    with open("segments.txt", "w", encoding="utf-8") as f:
        for dialogue in dialogues:
            for message in dialogue:
                f.write("".join(c for c in message["content"] if not spelled_in_bytes(c)) + "\n")
        f.write("\n".join(["user", "assistant", "system"] * 500))
    sp.SentencePieceTrainer.train(
        input="segments.txt", model_prefix="sp", vocab_size=1024, model_type="bpe", byte_fallback=True, split_digits=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        control_symbols=[START, END], unk_id=0, bos_id=BOS, eos_id=2, pad_id=-1, character_coverage=1.0,
        input_sentence_size=40000, shuffle_input_sentence=False, num_threads=1, minloglevel=2)
    pieces = sp.SentencePieceProcessor(model_file="sp.model")
    start, end, newline = (pieces.piece_to_id(p) for p in (START, END, "<0x0A>"))

    ids, mask, known = [], [], {}
    for dialogue in dialogues:
        ids.append(BOS)
        mask.append(0)
        for message in dialogue:
            for text in (message["role"], message["content"]):
                if text not in known:
                    known[text] = pieces.encode(text)
            head = [start] + known[message["role"]] + [newline]
            body = known[message["content"]] + [end]
            ids += head + body + [newline]
            # Only what the assistant says is to be learnt well.
            mask += [0] * len(head) + [int(message["role"] == "assistant")] * len(body) + [0]
    np.save("ids.npy", np.array(ids, np.uint16))
    np.save("mask.npy", np.array(mask, np.uint8))
    print(f"{len(dialogues)} dialogues, {len(ids)} tokens")


if __name__ == "__main__":
    main()
