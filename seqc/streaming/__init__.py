"""From a Program over whole sequences to one over the next steps of them, with the state in between as inputs and outputs."""
