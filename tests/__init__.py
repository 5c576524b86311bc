"""The checker of jaxtyping's shapes under pytest: beartype, with int accepted where float is meant."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
