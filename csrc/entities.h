// Character references, as ftfy and as HTML 5 read them.
#pragma once

#include "text.h"

namespace fastclip {

// Both rewrite `text`, using the memory of `scratch`.
//
// ftfy.fixes.unescape_html: `&#?[0-9A-Za-z]{1,24};`, if the name is known or the number is consumed
// whole. How it sees whether the number was: no ";" is left, so "&#59;" is left to html.unescape.
void unescape_strictly(Text& text, Text& scratch);
// html.unescape: `&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)`.
void unescape(Text& text, Text& scratch);

}  // namespace fastclip
