"""What Keras's backends do differently. No other folder asks which one runs."""
