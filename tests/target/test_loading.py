"""Targets by name, in GGUF files too."""

from pathlib import Path

import gguf
import numpy
import pytest
import torch

from jetspec_hf.target import loading
from jetspec_hf.target.loading import check_target_name, load_target

HIDDEN, INNER, VOCAB = 32, 64, 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of one layer in `tiny.gguf`, every weight 1 or more."""
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    sizes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (INNER, HIDDEN),
        "blk.0.ffn_up": (INNER, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, INNER),
    }
    for name, size in sizes.items():
        values = 1 + numpy.arange(numpy.prod(size), dtype=numpy.float32).reshape(size) % 7
        if len(size) == 2:  # in blocks of 8 bits, as a quantized model has them
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    return tmp_path


def test_a_gguf_file_becomes_ordinary_numbers(folder: Path) -> None:
    target = load_target(str(folder), "tiny.gguf", dtype=torch.float32)
    expected = 1 + torch.arange(VOCAB * HIDDEN).reshape(VOCAB, HIDDEN) % 7
    found = target.get_input_embeddings().weight
    assert (found.dtype, target.config.num_hidden_layers) == (torch.float32, 1)
    torch.testing.assert_close(found.detach(), expected.float(), rtol=0.01, atol=0.03)
    assert {type(value) for value in target.parameters()} == {torch.nn.Parameter}
    assert target(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_gguf_files_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"is GGUF; pass as `gguf_file` one of tiny\.gguf"):
        check_target_name(str(folder))
    with pytest.raises(ValueError, match=r"no `gguf_file` 'big\.gguf' in .*, which holds tiny\.gguf"):
        check_target_name(str(folder), "big.gguf")
    with pytest.raises(ValueError, match=r"tiny\.gguf' is a file; .* and the name of the file as `gguf_file`"):
        check_target_name(str(folder / "tiny.gguf"))
    monkeypatch.setattr(loading, "is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match=r"run `pip install jetspec_hf\[gguf\]`"):
        check_target_name(str(folder), "tiny.gguf")
