"""Writes weights.pkl and sp.model as one GGUF file, matrices in Q8_0.

    python export.py ../model/demo-q8.gguf
"""

import pickle
import sys

import gguf
import numpy as np
import sentencepiece as sp

from train import CONTEXT, HEADS, KV_HEADS

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
UNKNOWN, CONTROL, BYTE, NORMAL = 2, 3, 6, 1


def main():
    with open("weights.pkl", "rb") as f:
        params, _, _ = pickle.load(f)
    pieces = sp.SentencePieceProcessor(model_file="sp.model")
    vocab, width = params["embedding"].shape
    layers = params["layers"]

    w = gguf.GGUFWriter(sys.argv[1], "llama")
    w.add_name("headgate-demo-2m")
    w.add_license("apache-2.0")
    w.add_context_length(CONTEXT)
    w.add_embedding_length(width)
    w.add_block_count(len(layers))
    w.add_feed_forward_length(layers[0]["ffn_gate"].shape[0])
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(width // HEADS)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(vocab)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)

    w.add_tokenizer_model("llama")
    w.add_token_list([pieces.id_to_piece(i).encode() for i in range(vocab)])
    w.add_token_scores([float(pieces.get_score(i)) for i in range(vocab)])
    w.add_token_types([UNKNOWN if pieces.is_unknown(i) else CONTROL if pieces.is_control(i) else BYTE if pieces.is_byte(i) else NORMAL
                       for i in range(vocab)])
    w.add_unk_token_id(pieces.unk_id())
    w.add_bos_token_id(pieces.bos_id())
    w.add_eos_token_id(pieces.piece_to_id("<|im_end|>"))
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(TEMPLATE)

    def matrix(name, a):
        q8 = gguf.GGMLQuantizationType.Q8_0
        w.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(a, np.float32), q8), raw_dtype=q8)

    def vector(name, a):
        w.add_tensor(name, np.ascontiguousarray(a, np.float32))

    matrix("token_embd.weight", params["embedding"])
    vector("output_norm.weight", params["norm"])
    for i, layer in enumerate(layers):
        for name, a in layer.items():
            (vector if name.endswith("_norm") else matrix)(f"blk.{i}.{name}.weight", a)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main()
