"""Values from outside: which are allowed, and the command line that sets them."""
