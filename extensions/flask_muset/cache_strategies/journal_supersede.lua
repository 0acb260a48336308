-- Forget some of the records of a key that coalesce and were accepted before a moment; those that
-- are claimed, when their claim ends.
-- ARGV: place, name, microseconds of the moment, the id behind which to begin or nothing.
-- Returns the id behind which there may be more, or nothing.
local now, key = clock(), ARGV[2]
local state = known(key)
local claimed, gone, ids, names = is_held(state, now) and state.ids, state.gone or '', {}, {}
local looked, size, bytes, last = 0, 0, 0, false
walk(stream(key), ARGV[4] == '' and '-' or '(' .. ARGV[4], '(' .. ARGV[3] .. '-0', function(entry)
  local record = record_of(entry)
  if record and record.c == '1' then
    if not has(claimed, record.seq) then
      ids[#ids + 1], names[#names + 1] = entry[1], 'f' .. record.seq
      bytes = bytes + #record.d
    elseif not has(gone, record.seq) then
      gone = gone .. ' ' .. record.seq .. ':'
    end
  end
  looked, size = looked + 1, size + (record and #record.d or 0)
  last = (size >= MOST_BYTES or looked == 1000) and entry[1]
  return not last
end)
begin()
if gone ~= (state.gone or '') then redis.call('HSET', facts(key), 'gone', gone) end
if ids[1] then
  redis.call('XDEL', stream(key), unpack(ids))
  redis.call('HDEL', facts(key), unpack(names))
  count(0 - #ids, 0 - bytes)
  tidy(key, now)
end
return last or ''
