"""Models in which layers are others: copies, changes in place, tf_keras."""
