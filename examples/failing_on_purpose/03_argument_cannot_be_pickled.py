"""An argument that cannot travel to another process: a lock, deep inside an object.

Look at: the error comes at once, at the line of the call, and names the path to the
culprit inside the arguments.  A lock means something in one process only; the way out is
to leave it out of what is sent (`__getstate__`) or to make it where it is used.
"""

import threading

import minray


class Account:
    def __init__(self):
        self.balance = 100
        self.lock = threading.Lock()


@minray.remote
def total(accounts):
    return sum(account.balance for account in accounts.values())


print(minray.get(total.remote({"ada": Account()})))
