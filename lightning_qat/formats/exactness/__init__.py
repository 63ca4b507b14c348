"""What a runtime computes of a trained model: its integers, whether its specs fit, and the live model made to compute the same."""
