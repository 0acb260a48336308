-- Accept a write: its record, and what the cache has of the key, both or neither.
-- What comes so late that its sender has given up does nothing, nor does what finds no room.
-- KEYS: value, lock.  ARGV: channel, sender, value or nothing to delete it, its milliseconds or 0
-- for no end, name, the microseconds of too late; place, writer, whether it coalesces or ? to take
-- the last record's writer, home, microseconds until it is due, most records, most bytes.
-- Returns the microseconds of now, and the sequence or why there is none.
local call, pcall = redis.call, redis.pcall
local channel, sender, data, lifetime, key, late = unpack(ARGV, 1, 6)
local place, writer, joins, home, delay, most, most_bytes = unpack(ARGV, 7)
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local text = string.format('%.0f', now)
if now > tonumber(late) then return {text, 'late'} end
local stream, facts = place .. 's:' .. key, place .. 'k:' .. key
local newest, list, held = {}, {}, false
-- Most keys have none of these.
if call('EXISTS', stream, facts, KEYS[2]) > 0 then
  newest, list = pcall('XREVRANGE', stream, '+', '-', 'COUNT', 1), pcall('HGETALL', facts)
  if newest.err or list.err then return {text, 'garbled'} end
  held = call('GET', KEYS[2])
end
local last, old, known, digits = newest[1], {}, {}, nil
if last then
  digits = string.match(last[1], '^%d+')
  for index = 1, #last[2], 2 do old[last[2][index]] = last[2][index + 1] end
end
for index = 1, #list, 2 do known[list[index]] = list[index + 1] end
if joins == '?' then
  if not old.w then return {text, '0'} end
  writer, joins, home = old.w, old.c or '0', old.h or ''
end
local replaces = old.d and old.c == '1' and joins == '1' and old.w == writer
local ends = replaces and known.token and tonumber(known.ends) or 0
-- As `is_held` has it.
if ends > now and ends <= now + 2 * (tonumber(known.lease) or 0) then
  replaces = not string.find(known.ids or '', ' ' .. digits .. ':', 1, true)
end
local counts = call('HMGET', place .. 'n', 'seq', 'pending', 'bytes')
local pending = math.max(0, counts[2] or 0)
local bytes = math.max(0, counts[3] or 0)
if not replaces and (pending >= tonumber(most) or bytes + #data > tonumber(most_bytes)) then
  return {text, 'full'}
end
local seq, moment = math.max(now, (counts[1] or 0) + 1, (digits or 0) + 1), text
-- Beyond this a number of Lua is not exact, and no clock is there.
if seq >= 2 ^ 53 then return {moment, 'garbled'} end
if seq > now then text = string.format('%.0f', seq) end
local since = replaces and (old.a or digits) or text
-- The first write: where it is refused, for want of memory or of order, nothing has changed.
local added = pcall('XADD', stream, text .. '-0', 'w', writer, 'c', joins, 'h', home, 'a', since,
  'd', data)
if type(added) == 'table' then
  if string.find(added.err, 'XADD', 1, true) then return {moment, 'garbled'} end
  return added
end
if replaces then
  call('XDEL', stream, last[1])
  if known['f' .. digits] then call('HDEL', facts, 'f' .. digits) end
  bytes = bytes - #old.d
else
  pending = pending + 1
end
call('HSET', place .. 'n', 'seq', text, 'pending', pending, 'bytes', bytes + #data,
  'wait', delay)
call('ZADD', place .. 'due', 'NX', now + delay, key)
if home ~= (old.h or '') and (not last or (replaces and call('XLEN', stream) == 1)) then
  call('HSET', place .. 'bound', key, home)
end
-- Only what is older, or was given up, can be superseded.
if joins == '1' and ((last and not replaces) or known.dead) then
  call('HSET', facts, 'x' .. writer, text)
end
-- As change.lua does.
if held and string.sub(held, 1, 1) == 'W' then
  call('SET', KEYS[2], string.match(held, '^W%d+:') .. '-', 'KEEPTTL')
elseif held then
  call('DEL', KEYS[2])
end
if data == '' then
  call('UNLINK', KEYS[1])
elseif lifetime == '0' then
  call('SET', KEYS[1], data)
else
  call('SET', KEYS[1], data, 'PX', lifetime)
end
call('PUBLISH', channel, sender .. 'k' .. key)
return {moment, text}
