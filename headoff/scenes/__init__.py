"""The procedural data set: scenes of shapes, and training and evaluation of the bundled detector."""
