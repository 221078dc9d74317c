"""What must be done before TensorFlow is imported: apart for that reason."""

import os


def use_one_thread():
    """Of TensorFlow's, in this process and in the workers that it starts.

    Steps this small gain nothing from threads: each core takes a training of
    its own, and a training of one thread gives the same figures again.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
    os.environ["TF_NUM_INTEROP_THREADS"] = "1"
    # Several trainings share a GPU, where there is one.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")


def silence():
    """Drops what TensorFlow logs, which would tear the progress bar.

    Exceptions come back to the main process all the same.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
