"""JetSpec for transformers: a draft head makes `generate` faster and leaves its output as it is.

from transformers import AutoModelForCausalLM, AutoTokenizer
from jetspec_hf import JetSpecDraftHead
target = AutoModelForCausalLM.from_pretrained("examples/demo_pair/target")
tokenizer = AutoTokenizer.from_pretrained("examples/demo_pair/target")
head = JetSpecDraftHead.from_pretrained("examples/demo_pair/head")
target.generate(**tokenizer("Janet has 3 ducks", return_tensors="pt"), assistant_model=head)
"""

from . import upstream
from .decoding.integration import install, uninstall
from .decoding.loop import decode_with
from .decoding.outputs import DraftStatistics, JetSpecGenerateOutput
from .drafting.candidates import JetSpecCandidateGenerator
from .drafting.options import DraftOptions
from .head.configuration_jetspec import JetSpecConfig
from .head.modeling_jetspec import JetSpecDraftHead
from .head.modeling_jetspec import register as _register
from .tree.tree import DraftTree, build_tree
from .version import __version__

__all__ = [
    "DraftOptions",
    "DraftStatistics",
    "DraftTree",
    "JetSpecCandidateGenerator",
    "JetSpecConfig",
    "JetSpecDraftHead",
    "JetSpecGenerateOutput",
    "__version__",
    "build_tree",
    "decode_with",
    "install",
    "uninstall",
]

upstream.warn_if_untested()
_register()
install()
