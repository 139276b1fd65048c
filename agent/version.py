"""Which Everstep this is."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """Everstep's version, or "source" when it runs from a checkout that is not installed."""
    try:
        return version("everstep")
    except PackageNotFoundError:
        return "source"
