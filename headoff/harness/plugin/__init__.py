"""The pytest plugin: options, the fixture `under_test`, and the verdict at the end of a run."""
