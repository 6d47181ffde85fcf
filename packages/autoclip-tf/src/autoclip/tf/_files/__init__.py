"""Files of Keras and TensorFlow: readers for the command, and the names in them."""
