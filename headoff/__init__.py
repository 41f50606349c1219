"""Switch off attention heads of a DETR decoder and see which detections survive.

Example:
    >>> import headoff
    >>> detector = headoff.load("scenes")
    >>> result = headoff.sweep(detector, headoff.sample_image(0))
    >>> for configuration, outcome in zip(result.configurations, result.outcomes):
    ...     print(configuration.name, outcome.counts)
"""

import lazy_loader

__version__ = "0.1.0"

# The public names are listed in `__init__.pyi`. Each is imported when it is first used: importing torch takes seconds,
# and pytest imports headoff's plugin in every run wherever headoff is installed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
