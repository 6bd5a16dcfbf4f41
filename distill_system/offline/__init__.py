"""Text and targets made ahead of any run: `distill-system generate`."""
