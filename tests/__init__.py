"""A package, so that it is found before the `tests` that other packages (laion-clap's) leave among the installed ones."""
