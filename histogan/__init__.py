__version__ = "0.1.0"

from histogan.core import old_modules

old_modules()  # names of version 0.1 that are not modules any more
