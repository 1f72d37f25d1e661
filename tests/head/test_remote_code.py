"""A head that carries its code, for whoever has not installed the package."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.heads import markov_head

from jetspec_hf import JetSpecConfig, JetSpecDraftHead

# Loads heads where the package cannot be imported, and only then imports it.
SCRIPT = """
import sys
from pathlib import Path


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jetspec_hf":
            raise ModuleNotFoundError(f"{name} is not installed", name=name)


blocker = Blocker()
sys.meta_path.insert(0, blocker)
import torch
from transformers import AutoModel, AutoModelForCausalLM

folder = Path(sys.argv[1])
head, edited = (AutoModel.from_pretrained(folder / name, trust_remote_code=True) for name in ("head", "edited"))
assert sys.modules[type(edited).__module__].EDITION == 2
assert not hasattr(sys.modules[type(head).__module__], "EDITION")
with torch.no_grad():
    states = head(**torch.load(folder / "inputs.pt")).last_hidden_state
torch.save((states, head.state_dict()), folder / "seen.pt")
head.save_pretrained(folder / "again")

sys.meta_path.remove(blocker)
assert "jetspec_hf" not in sys.modules
import jetspec_hf

target = AutoModelForCausalLM.from_pretrained(folder / "target")
options = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
plain = target.generate(torch.tensor([[3, 14, 15]]), **options)
drafted = target.generate(torch.tensor([[3, 14, 15]]), **options, assistant_model=head)
assert drafted.sequences.tolist() == plain.sequences.tolist()
assert sum(drafted.statistics.drafted_nodes) > 0
"""


def test_a_head_drafts_from_the_code_that_it_carries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_target: Callable
) -> None:
    for one, auto_class in ((JetSpecConfig, "AutoConfig"), (JetSpecDraftHead, "AutoModel")):
        monkeypatch.setattr(one, "_auto_class", None)  # and again after the test
        one.register_for_auto_class(auto_class)
    target = make_target()
    sliding = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 4}
    head = markov_head(target, **sliding)
    target.save_pretrained(tmp_path / "target")
    for name in ("head", "edited"):
        head.save_pretrained(tmp_path / name)
    with (tmp_path / "edited" / "modeling_jetspec.py").open("a") as file:
        file.write("\nEDITION = 2\n")
    width = len(head.config.target_layer_ids) * head.config.hidden_size
    inputs = {"noise_embeds": torch.randn(1, 6, 32), "context_hidden_states": torch.randn(1, 9, width)}
    torch.save(inputs, tmp_path / "inputs.pt")

    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    states, weights = torch.load(tmp_path / "seen.pt")
    with torch.no_grad():
        torch.testing.assert_close(states, head(**inputs).last_hidden_state)
    assert weights.keys() == head.state_dict().keys()
    assert all(torch.equal(weights[name], weight) for name, weight in head.state_dict().items())
    for name in ("head", "again"):  # it can be passed on
        files = {path.name for path in (tmp_path / name).glob("*.py")}
        assert {"modeling_jetspec.py", "configuration_jetspec.py", "markov.py"} <= files
        assert "tree.py" not in files  # what decodes stays in the package
