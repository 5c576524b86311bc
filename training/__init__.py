"""The offline pipeline: a pretrained network in, one manifold checkpoint out."""

import sys
from importlib.util import find_spec

# A device's install has the command too, and must say in one line what it lacks.
if sys.version_info < (3, 11):
    sys.exit("neumeta-train: needs Python 3.11 or later (neumeta-pull runs on 3.10)")
if not all(map(find_spec, ("torch", "sklearn", "PIL", "tqdm", "pydantic", "matplotlib"))):
    sys.exit("neumeta-train: this is a device's install; pip install 'neumeta-serve[training]'")
