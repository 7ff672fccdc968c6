"""What a rank ends with, and what whoever started it should do. Imports nothing.

0 is success, 1 a fault of ours or of the machine (try again), 2 a mistake the user can put right (do not).
"""

SAVED = 75
"""It was told to stop and has saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""
HUNG = 76
"""A rank gave no sign of life for too long, and every other wrote down where it stood: run the same command again."""
DIVERGED = 77
"""Too many steps in a row had to be left out: change the recipe. The weights of the last good step are saved."""
