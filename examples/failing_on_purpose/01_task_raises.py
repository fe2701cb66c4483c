"""A task raises, and the driver that asks for its result gets the error.

Look at: the driver catches the task's own exception class, as if the call had been an
ordinary one.  Then the same error is let through: its traceback shows the lines of the
task, not minray's, and the error that caused it is there too.
"""

import minray

PRICES = {"apple": "0.40", "pear": "0,55"}


@minray.remote
def price(fruit):
    try:
        return float(PRICES[fruit])
    except ValueError as error:
        raise LookupError(f"the price list has no usable price for {fruit!r}") from error


print("apple:", minray.get(price.remote("apple")))
try:
    minray.get(price.remote("quince"))
except KeyError as error:
    print("caught a", type(error).__name__, "that is a KeyError")
print("pear:", minray.get(price.remote("pear")))
