"""Networks only: no losses, no I/O, no noise. Every module holds nothing but Params."""
