"""Settings of all tests; fixtures belong beside the tests that use them."""

from hypothesis import settings

# The machines that run the tests are shared: how long one example takes says nothing.
settings.register_profile("everstep", deadline=None)
settings.load_profile("everstep")
