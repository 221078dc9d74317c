"""What a worker does before it imports TensorFlow: apart for that reason."""

import os


def silence():
    """Drops what TensorFlow logs, which would tear the progress bar.

    Exceptions come back to the main process all the same.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
