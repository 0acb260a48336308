-- Some dead letters, as they were given up.  ARGV: place, id behind which they begin or nothing,
-- how many at most.  Returns for each its id, its fields, and whether it is superseded.
local found, size, from, left = {}, 0, ARGV[2] == '' and '-' or '(' .. ARGV[2], tonumber(ARGV[3])
while left > 0 and size < MOST_BYTES do
  local page = redis.call('XRANGE', DEAD, from, '+', 'COUNT', math.min(left, 10))
  for _, entry in ipairs(page) do
    local letter = named(entry[2])
    found[#found + 1] = {entry[1], entry[2], is_superseded(letter) and 1 or 0}
    size = size + #(letter.d or '')
    from = '(' .. entry[1]
  end
  left = #page < 10 and 0 or left - 10
end
return found
