"""What a recurrence computes, told from its body alone: by algebra on the graph, confirmed by numbers."""
