"""What a rank ends with, and what whoever started it should do. Imports nothing. docs/exit-codes.md says more.

0 is success, 2 a mistake the user can put right: running the same command again would not help.
"""

FAULT = 1
"""Something of ours or of the machine broke: run the same command again."""
SAVED = 75
"""It was told to stop and has saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""No rank gave a sign of life for too long, and every one wrote down where it stood: run the same command again."""
DIVERGED = 77
"""Too many steps in a row had to be left out: change the recipe. The weights of the last good step are saved."""
