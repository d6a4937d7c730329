"""What a project's files say, as one HTML page that opens offline.

project    reads whatever is there
verdicts   forgot, or only pretends? from intervals
charts     the house style of all figures, and their rendering
results_charts, training_charts, sink_charts
           rows and arrays in, Vega-Lite specs out
page       sections, and the template that holds them
plots      the page of `dvc plots`, with its scripts inside
"""
