"""What is minimised: ratios, surrogates, divergences, and losses of the forward process."""
