"""The page of `dvc plots show`, with Vega inside: DVC's own loads it from the network.

`.dvc/plots/offline.html` is made by

    python -m unsink.report.plots .dvc/plots/offline.html

and named in `.dvc/config` (`plots.html_template`). Make it anew when vl-convert brings another Vega.
"""

import sys
from pathlib import Path

import vl_convert

from unsink.artifacts import write_text
from unsink.report.charts import VERSION

_NOTICE = """
Contains Vega, Vega-Lite and Vega-Embed as packed by vl-convert, and what they contain:

Vega, Vega-Lite, Vega-Embed, Vega-Tooltip, Vega-Themes, Vega-Interpreter - BSD 3-Clause
  Copyright (c) 2015, University of Washington Interactive Data Lab. All rights reserved. Redistribution and use
  in source and binary forms, with or without modification, are permitted provided that the following conditions
  are met: 1. Redistributions of source code must retain the above copyright notice, this list of conditions and
  the following disclaimer. 2. Redistributions in binary form must reproduce the above copyright notice, this
  list of conditions and the following disclaimer in the documentation and/or other materials provided with the
  distribution. 3. Neither the name of the copyright holder nor the names of its contributors may be used to
  endorse or promote products derived from this software without specific prior written permission. THIS
  SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS" AND ANY EXPRESS OR IMPLIED WARRANTIES,
  INCLUDING, BUT NOT LIMITED TO, THE IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE
  ARE DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE FOR ANY DIRECT, INDIRECT,
  INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF
  SUBSTITUTE GOODS OR SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER CAUSED AND ON
  ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY, OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE)
  ARISING IN ANY WAY OUT OF THE USE OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
D3 modules, topojson-client, internmap, delaunator, semver - ISC
  Copyright 2010-2024 Mike Bostock; 2019 Mapbox; Isaac Z. Schlueter and Contributors Permission to use, copy,
  modify, and/or distribute this software for any purpose with or without fee is hereby granted, provided that
  the above copyright notice and this permission notice appear in all copies. THE SOFTWARE IS PROVIDED "AS IS"
  AND THE AUTHOR DISCLAIMS ALL WARRANTIES WITH REGARD TO THIS SOFTWARE INCLUDING ALL IMPLIED WARRANTIES OF
  MERCHANTABILITY AND FITNESS. IN NO EVENT SHALL THE AUTHOR BE LIABLE FOR ANY SPECIAL, DIRECT, INDIRECT, OR
  CONSEQUENTIAL DAMAGES OR ANY DAMAGES WHATSOEVER RESULTING FROM LOSS OF USE, DATA OR PROFITS, WHETHER IN AN
  ACTION OF CONTRACT, NEGLIGENCE OR OTHER TORTIOUS ACTION, ARISING OUT OF OR IN CONNECTION WITH THE USE OR
  PERFORMANCE OF THIS SOFTWARE.
fast-json-patch, json-stringify-pretty-compact, lodash.debounce, robust-predicates (Unlicense) - MIT
  Copyright (c) 2013-2020 Joachim Wester; 2014-2022 Simon Lydell; OpenJS Foundation and other contributors
  Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
  documentation files (the "Software"), to deal in the Software without restriction, including without
  limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the
  Software, and to permit persons to whom the Software is furnished to do so, subject to the following
  conditions: The above copyright notice and this permission notice shall be included in all copies or
  substantial portions of the Software. THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS
  OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE
  AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR
  OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
  WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_GLOBAL = "window.vegaEmbed = vegaEmbed;"

_PAGE = """<!doctype html>
<html lang="en">
<!--{notice}-->
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline' 'unsafe-eval' data: blob: file:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>DVC plots</title>
<link rel="icon" href="data:,">
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 76rem; color: #1f2328; background: #fff; }
img { max-width: 100%; }
body > div { overflow-x: auto; margin-block: 1.5rem; }
</style>
<script>(() => {
{scripts}
})();</script>
</head>
<body>
<h1>DVC plots</h1>
{plot_divs}
</body>
</html>
"""  # noqa: E501


def offline_page() -> str:
    """A template for DVC: its plots go where `{plot_divs}` stands. Packing the scripts takes some ten seconds."""
    scripts = vl_convert.javascript_bundle(_GLOBAL, vl_version=VERSION)
    if "</script" in scripts:
        raise ValueError("the packed scripts would end their element")
    return _PAGE.replace("{notice}", _NOTICE).replace("{scripts}", scripts)


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), offline_page())
