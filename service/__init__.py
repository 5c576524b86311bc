"""The online path: a request in, weights of exactly that size out."""

import sys
from importlib.util import find_spec

# A device's install has the command too, and must say in one line what it lacks.
if sys.version_info < (3, 11):
    sys.exit("neumeta-serve: needs Python 3.11 or later (neumeta-pull runs on 3.10)")
if not all(map(find_spec, ("torch", "fastapi", "uvicorn", "pydantic_settings", "redis"))):
    sys.exit("neumeta-serve: this is a device's install; pip install 'neumeta-serve[service]'")
