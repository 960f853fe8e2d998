"""The service with points at its doors: ``python -m tests.crash.child run``."""

if __name__ == "__main__":  # the process that reads records imports this file too
    from tests.crash.doors import run

    run()
