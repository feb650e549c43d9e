"""`python -m finetrial`."""

from finetrial.cli import main

main()
