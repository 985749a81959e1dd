"""Tables, plots and targets, written from committed results alone."""
