"""Ray's old home of the state API; here it is `minray.state`.

>>> from minray.experimental.state.api import list_tasks
>>> list_tasks is minray.state.list_tasks
True
"""

from minray.util.state import *  # noqa: F403
from minray.util.state import __all__ as __all__
