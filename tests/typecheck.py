"""What jaxtyping calls on every function of the package during tests."""

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float too


def check(function):
    return _checked(function)
