"""What training and inference do differently, measured and explained."""
