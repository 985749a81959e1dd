"""What is measured: cases, inputs, and the float64 oracle that errors are taken against."""
