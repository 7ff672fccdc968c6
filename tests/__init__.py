"""A package, so that it is found before the `tests` that others (laion-clap) leave among the installed packages."""
