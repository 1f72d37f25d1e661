"""The example that times rounds at the size of real models, at a size that is not."""

import argparse
import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "examples/studies/round_times.py"))


def test_a_row_that_fails_says_why_and_leaves_the_others() -> None:
    args = argparse.Namespace(
        shape="tiny", dtype="float32", contexts=[8, 0], caches=SCRIPT["CACHES"], nodes=[3], rounds=2
    )
    rows = {(row["context"], row["cache"], row["nodes"]): row for row in SCRIPT["measure_all"](args, 1e9)}
    assert list(rows) == [
        (n, cache, nodes) for n in (0, 8) for cache in ("dynamic", "static") for nodes in ("plain", 3)
    ]
    assert all("error" in row and "ms" not in row for (context, *_), row in rows.items() if context == 0)
    plain, drafted = rows[8, "dynamic", "plain"], rows[8, "dynamic", 3]
    assert drafted["x plain"] == drafted["ms"] / plain["ms"]
    assert sum(drafted[phase] for phase in SCRIPT["PHASES"]) > 0
    assert set(drafted) >= set(SCRIPT["COLUMNS"])
    assert SCRIPT["as_line"](drafted).count("|") == SCRIPT["as_line"](rows[0, "dynamic", "plain"]).count("|")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_floor_counts_what_the_forwards_read(is_tied: bool, make_target, make_head) -> None:
    target = make_target(tie_word_embeddings=is_tied).to(torch.bfloat16)
    head = make_head(target)
    layers = sum(weight.numel() for weight in target.model.layers.parameters())
    cached = 4 * 2 * 2 * 8 * 10  # layers, keys and values, their heads, sizes, tokens
    plain = layers + target.model.norm.weight.numel() + 64 * 32 + cached
    assert SCRIPT["bytes_read"](target, None, 10) == 2 * plain
    head_cached = 2 * 2 * 2 * 8 * 10
    drafted = 2 * plain + 4 * head.num_parameters() + 4 * head_cached + 2 * 64 * 32  # the head is in float32
    assert SCRIPT["bytes_read"](target, head, 10) == drafted
