"""What the library takes for the id of its process is the id of its process."""

import os

from starlette_aigateway.process import THIS


def test_a_forked_child_knows_that_it_is_another_process() -> None:
    assert THIS.pid == os.getpid()
    child = os.fork()
    if child == 0:
        os._exit(0 if THIS.pid == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert THIS.pid == os.getpid()
