"""JetSpec for transformers: a draft head makes `generate` faster and leaves its output as it is.

from transformers import AutoModelForCausalLM, AutoTokenizer
from jetspec_hf import JetSpecDraftHead
target = AutoModelForCausalLM.from_pretrained("examples/demo_pair/target")
tokenizer = AutoTokenizer.from_pretrained("examples/demo_pair/target")
head = JetSpecDraftHead.from_pretrained("examples/demo_pair/head")
target.generate(**tokenizer("Janet has 3 ducks", return_tensors="pt"), assistant_model=head)
"""

from . import upstream
from .candidates import JetSpecCandidateGenerator
from .configuration_jetspec import JetSpecConfig
from .draft_options import DraftOptions
from .generation import decode_with
from .integration import install, uninstall
from .modeling_jetspec import JetSpecDraftHead
from .modeling_jetspec import register as _register
from .outputs import DraftStatistics, JetSpecGenerateOutput
from .tree import DraftTree, build_tree
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
