"""What is needed of transformers: every name by itself, so that a new release fails by name."""

import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import transformers
from transformers import GenerationMixin

from jetspec_hf.upstream import NEEDED, NEWEST, OLDEST, WRAPPED, missing_names, warn_if_untested

ROOT = Path(__file__).parents[1]
# How a call with a head ends, in a process of its own, after something was done to transformers.
CALL = """
import transformers
{change}
import jetspec_hf
import torch
from heads import random_head
from transformers import Qwen3Config, Qwen3ForCausalLM
config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=None)
target = Qwen3ForCausalLM(config).eval()
print(target.generate(torch.tensor([[3, 14]]), max_new_tokens=4, assistant_model=random_head(target)).shape)
"""


@pytest.mark.parametrize("name", NEEDED)
def test_transformers_has(name: str) -> None:
    assert name not in missing_names()


@pytest.mark.parametrize("name", WRAPPED)
def test_generation_mixin_takes_what_we_wrap(name: str) -> None:
    assert WRAPPED[name] <= set(inspect.signature(getattr(GenerationMixin, name)).parameters)


def call_after(change: str) -> subprocess.CompletedProcess:
    code = CALL.format(change=change)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=False)


def test_a_missing_name_is_said_before_the_first_token() -> None:
    done = call_after("del transformers.GenerationMixin._prefill")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(
        f"RuntimeError: transformers {transformers.__version__} has no `GenerationMixin._prefill`"
    )
    assert f'pip install "transformers>=5.15,<{NEWEST[0]}.{NEWEST[1] + 1}"' in message


def test_an_untested_version_warns_once_and_works() -> None:
    done = call_after("transformers.__version__ = '6.0.0rc1'")
    assert "torch.Size([1, 6])" in done.stdout
    assert done.stderr.count("UserWarning") == 1
    assert f"tested with transformers 5.15 to {NEWEST[0]}.{NEWEST[1]} and found 6.0.0rc1" in done.stderr


@pytest.mark.parametrize("version", ["5.14.3", f"{NEWEST[0]}.{NEWEST[1] + 1}.0.dev0"])
def test_an_untested_version_is_named(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.warns(UserWarning, match=f"and found {version}; if it fails, run `pip install"):
        warn_if_untested()


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) > NEWEST, reason="a release that is not tested yet"
)
def test_a_tested_version_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()


def test_what_is_installed_is_what_is_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"transformers>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"' in project
    assert f"transformers {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}" in (ROOT / "README.md").read_text()


def test_no_other_module_speaks_private_names() -> None:
    private = {name.rpartition(".")[2] for name in NEEDED if "._" in name} | {*WRAPPED, "past_key_values"}
    for path in (ROOT / "jetspec_hf").glob("**/*.py"):
        # The head's own code travels alone, and looks like a model of transformers.
        if path.name not in ("upstream.py", "modeling_jetspec.py"):
            spoken = set(re.findall(r"\w+", path.read_text()))
            assert not spoken & private, path.name
