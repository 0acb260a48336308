-- End a claim; 1 if it was still held.
-- ARGV: place, name, token, the last sequence that is done with; the sequence of what the holder
-- has written itself or 0, the writer of that or nothing for all; where one has failed its
-- sequence, the error, whether that is final, microseconds of a pause, whether it counts as an
-- attempt.
local now, key = clock(), ARGV[2]
local state = known(key)
if state.token ~= ARGV[3] or not is_held(state, now) then return 0 end
begin()
local gone, names, bytes, due = {}, {}, 0, now
local function remove(seq, size)
  gone[#gone + 1] = seq .. '-0'
  bytes = bytes + size
  if state['f' .. seq] then names[#names + 1] = 'f' .. seq end
end

for seq, size in string.gmatch(state.ids or '', ' (%d+):(%d+)') do
  if tonumber(seq) <= tonumber(ARGV[4]) or has(state.gone, seq) then remove(seq, size) end
end

local function give_up(entry, attempts, first, error)
  local record = record_of(entry)
  redis.call('XADD', DEAD, '*', 'k', key, 'q', record.seq, 'w', record.w, 'c', record.c or '0', 'h',
    record.h or '', 'd', record.d, 'n', attempts, 'f', first == '-' and now or first, 'l', now,
    'e', error)
  state.dead = redis.call('HINCRBY', facts(key), 'dead', 1)
  remove(record.seq, #record.d)
end

local seq = ARGV[7]
local is_left = seq and has(state.ids, seq) and not has(state.gone, seq)
local entry = is_left and redis.call('XRANGE', stream(key), seq .. '-0', seq .. '-0')[1]
if entry then
  local attempts, first, error = string.match(state['f' .. seq] or '', '^(%d+) (%S+) (.*)$')
  attempts, first = (attempts or 0) + ARGV[11], first or '-'
  if ARGV[8] ~= '' then error = ARGV[8] end
  if first == '-' and ARGV[11] == '1' then first = string.format('%.0f', now) end
  if ARGV[9] == '1' then
    give_up(entry, attempts, first, error or '')
  else
    due = now + ARGV[10]
    if attempts > 0 or error then
      redis.call('HSET', facts(key), 'f' .. seq, attempts .. ' ' .. first .. ' ' .. (error or ''))
    end
  end
end
let_go(key)
if names[1] then redis.call('HDEL', facts(key), unpack(names)) end
if #gone > 0 then
  -- Those that are there: others may have taken some away.
  local removed = redis.call('XDEL', stream(key), unpack(gone))
  if removed > 0 then count(0 - removed, 0 - bytes) end
end
-- Only what was given up, or is left and may be, can be superseded.
if ARGV[5] ~= '0' and (state.dead or redis.call('EXISTS', stream(key)) == 1) then
  redis.call('HSET', facts(key), 'y' .. ARGV[6], ARGV[5])
end
if tidy(key, now) then redis.call('ZADD', DUE, due, key) end
return 1
