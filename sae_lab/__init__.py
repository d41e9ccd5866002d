from sae_lab.lm.model import LM
from sae_lab.lm.text import load_text
from sae_lab.store import Store, harvest
from sae_lab.types import Site
from sae_lab import cache
__version__="0.1.0"
